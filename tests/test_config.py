"""Every setting says what it is for."""

from shardes.config import help_text, keys


def test_help_lists_every_key_with_its_meaning():
    text = help_text()
    for key, (_, meaning) in keys().items():
        assert key in text and meaning in text

"""The subcommands of `shardes`, one module each; launchers/ and tools/ start them too."""

from shardes.distributed import environment

environment.prepare()

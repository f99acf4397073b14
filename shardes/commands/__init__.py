"""What the command `shardes` and the scripts in launchers/ and tools/ do."""

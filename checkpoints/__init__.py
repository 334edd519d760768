"""From files to weights and back; nothing in a file is executed."""

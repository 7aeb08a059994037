"""The operating system: errors, signals, files, the terminal, hardware."""

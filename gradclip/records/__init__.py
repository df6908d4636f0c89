"""What a step leaves behind: its record, kept on the device and written in batches."""

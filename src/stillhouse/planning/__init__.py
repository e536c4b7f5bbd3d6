"""What a run takes before it starts: memory, time and disk, from configurations alone."""

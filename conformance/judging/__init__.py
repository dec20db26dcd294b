"""What the answers are worth: the truth, the yardstick, the rules. Nothing here can be imported where a backend runs."""

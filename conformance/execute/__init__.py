"""What a backend answers: its process, and the recordings that it leaves. Nothing here knows an answer."""

"""The training loop: generic over a `Task`, resumable to the bit."""

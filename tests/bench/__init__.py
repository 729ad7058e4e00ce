"""What `make bench` measures: ours beside a peer's, in turn, in one process, on whatever machine this is."""

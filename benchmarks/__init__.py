"""What the README quotes: each figure beside a peer's, from the same run on the same machine."""

"""Other libraries' offline learners on the files and by the protocol of this project (docs/baselines.md)."""

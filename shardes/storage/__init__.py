"""What is kept on disk: journal, snapshots, resume, export."""

"""What is scored, and on what: models, captions, token rows."""

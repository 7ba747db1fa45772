"""Generation and scoring: token ids in and out, on any mesh."""

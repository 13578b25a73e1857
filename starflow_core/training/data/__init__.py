"""What a model is trained on: files with captions, brought to the trained shapes, encoded once, and dealt out."""

"""Speed on the shapes of real models with random weights; nothing is downloaded."""

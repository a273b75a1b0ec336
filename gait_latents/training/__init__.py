"""A training run: its plan, its data, its steps, its folder, and the trained model that is left."""

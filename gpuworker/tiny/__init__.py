"""The base model that ships with the product: its generated corpus, its training script, its files."""

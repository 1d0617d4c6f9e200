"""Tests of the recipes: what they submit, and that a loop may die at any point."""

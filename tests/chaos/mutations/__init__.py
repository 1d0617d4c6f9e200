"""Takes the protections of the product away, one at a time, and asks the tests whether they notice."""

"""The pages in a real browser against a real server; each test has a web process of its own."""

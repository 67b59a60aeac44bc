"""Load tests of a server: requests sent, what became of them, and reports."""

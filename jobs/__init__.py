"""Command-line jobs: parse, check, call the library, print one URI."""

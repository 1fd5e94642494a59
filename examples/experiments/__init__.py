"""The runs behind the tables in docs, and how they are reported."""

"""Studies of algorithms from samples: each a question, its tables and a picture; ../README.md lists them."""

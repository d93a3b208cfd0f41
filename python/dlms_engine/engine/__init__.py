"""Everything that alternates the network and the rows of a policy."""

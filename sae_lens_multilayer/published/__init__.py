"""The MLSAEs that the paper's authors published: where they are and how they load."""

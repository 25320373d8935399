"""The MLSAEs that the paper's authors published: their names, files and loading."""

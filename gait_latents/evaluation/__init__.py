"""Whether generated images are any good: distances, copies, classifiers, and the report about them."""

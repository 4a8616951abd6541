"""Writing the edited model: full checkpoint, model card, manifest."""

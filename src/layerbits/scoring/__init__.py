"""The engine: candidates + model + rows → scores."""

"""The remote rung: a server of the owner's choice, behind the ladder's largest sub-model."""

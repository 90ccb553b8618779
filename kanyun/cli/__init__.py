"""What all commands share: their parser, their progress, and how a machine is checked for them."""

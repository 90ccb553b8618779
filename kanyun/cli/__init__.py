"""What all commands share: how they are asked, how they show progress, and how a machine is checked for them."""

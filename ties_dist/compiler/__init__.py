"""From a method's plain torch function to a loop for this processor or GPU."""

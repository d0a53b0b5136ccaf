"""One module for each instruction set; its ``INSTRUCTION_SET`` says what it offers and who can run it."""

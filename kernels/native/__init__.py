"""The CPU operations in C: int8 products, heads, attention, on threads of their own. Absent where no compiler was."""

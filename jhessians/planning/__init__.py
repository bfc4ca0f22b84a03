"""What a run will take, before anything is rented: memory, time and traffic, from shapes alone."""

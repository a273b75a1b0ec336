"""What every wing needs: command lines, printing, errors, files, devices, processes. It imports no other wing."""

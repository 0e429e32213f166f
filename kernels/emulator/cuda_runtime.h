// Included by a kernel; everything stands in emulator.h already.

/* What the preloaded library shows to the program; all else is hidden. */
#ifndef LASAGNA_EPC_EXPORT_H
#define LASAGNA_EPC_EXPORT_H

#define EXPORT __attribute__((visibility("default")))

#endif

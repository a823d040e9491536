#!/bin/sh
# Shows a host this number of NVIDIA GPUs on its PCI bus and no other device, as a host without their driver has them:
#   bus.sh COUNT
# Where the stand-in driver builds its module, the headers of the running kernel seem to be.
set -eu
bus=/sys/bus/pci/devices
stand_in=/var/lib/stand-in-gpu
! mountpoint -q "$bus" || umount "$bus"
rm -rf "$stand_in"
mkdir -p "$stand_in" "/lib/modules/$(uname -r)/build"
count=0
while [ "$count" -lt "$1" ]; do
    count=$((count + 1))
    mkdir "$stand_in/0000:0$count:00.0"
    echo 0x10de >"$stand_in/0000:0$count:00.0/vendor"
    echo 0x030200 >"$stand_in/0000:0$count:00.0/class"
done
mount --bind "$stand_in" "$bus"

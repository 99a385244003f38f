#!/bin/bash
# Makes the tests' guest: guest.sh FOLDER gives FOLDER/vmlinuz and FOLDER/initrd.gz, once.
# Debian's cloud kernel, busybox, and an init that ticks on the console, checks its memory, writes to its disk, and
# takes commands from the console.
set -euo pipefail
out=$1
[ -e "$out/done-5" ] && exit 0
mkdir -p "$out"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
package=$(apt-cache depends linux-image-cloud-amd64 | awk '/Depends: linux-image-/ { print $2; exit }')
apt-get -o APT::Sandbox::User=root -qq download "$package"
dpkg -x "$package"_*.deb kernel
modules=$(echo kernel/lib/modules/*/kernel)
mkdir -p root/{bin,proc,sys,dev,lib,tmp}
cp "$(command -v busybox)" root/bin/busybox
n=10
for module in drivers/virtio/virtio_ring drivers/virtio/virtio drivers/virtio/virtio_pci_legacy_dev \
    drivers/virtio/virtio_pci_modern_dev drivers/virtio/virtio_pci drivers/block/virtio_blk net/core/failover \
    drivers/net/net_failover drivers/net/virtio_net drivers/char/virtio_console drivers/char/hw_random/rng-core \
    drivers/char/hw_random/virtio-rng drivers/virtio/virtio_balloon; do
    if [ -e "$modules/$module.ko" ]; then
        cp "$modules/$module.ko" "root/lib/$n-$(basename $module).ko"
        n=$((n + 1))
    fi
done
cat > root/init <<'INIT'
#!/bin/busybox sh
B=/bin/busybox
$B mount -t proc p /proc
$B mount -t sysfs s /sys
$B mount -t devtmpfs d /dev
$B mount -t tmpfs t /tmp
for module in /lib/*.ko; do $B insmod $module; done
tty=/dev/ttyS0
[ -c /dev/hvc0 ] && tty=/dev/hvc0
exec > $tty 2>&1
while read command; do
    case $command in
        off) $B poweroff -f ;;
        reboot) $B reboot -f ;;
        # Writes memory all the time, twice each, and sees when one write of the two is lost.
        stress) $B awk 'BEGIN {
                    n = 30000
                    for (i = 0; i < n; i++) { a[i] = 0; b[i] = 0 }
                    for (;;) {
                        for (k = 0; k < 5000; k++) {
                            i = int(rand() * n)
                            if (a[i] != b[i]) { print "@memory BAD " i, a[i], b[i]; exit }
                            a[i]++
                            b[i]++
                        }
                        print "@memory good", ++rounds
                        fflush()
                    }
                }' & ;;
        calm) $B killall awk; echo "@calm" ;;
    esac
done < $tty &
$B dd if=/dev/urandom of=/tmp/ballast bs=1M count=32 2>/dev/null
sum=$($B md5sum < /tmp/ballast)
# In the background, so that it costs no ticks.
while :; do
    [ "$($B md5sum < /tmp/ballast)" = "$sum" ] && echo "@sum good" || echo "@sum BAD"
    $B sleep 1
done &
boot=$($B cat /proc/sys/kernel/random/boot_id)
echo "@boot $boot"
[ -b /dev/vda ] || echo "@disk BAD: none"
[ -d /sys/class/net/eth0 ] || echo "@nic BAD: none"
i=0
while :; do
    i=$((i + 1))
    # Written through, dropped from the cache, read back from the device.
    echo "seq $i" | $B dd of=/dev/vda bs=512 count=1 conv=sync,fsync seek=$((i % 1000)) 2>/dev/null \
        && echo 1 > /proc/sys/vm/drop_caches \
        && back=$($B dd if=/dev/vda bs=512 count=1 skip=$((i % 1000)) 2>/dev/null | $B head -n 1) \
        && [ "$back" = "seq $i" ] || echo "@disk BAD $i"
    read up rest < /proc/uptime
    echo "@tick $i $up"
    $B usleep 100000
done
INIT
chmod +x root/init
(cd root && find . | busybox cpio -o -H newc 2>/dev/null) | gzip -1 > "$out/initrd.gz"
cp kernel/boot/vmlinuz-* "$out/vmlinuz"
touch "$out/done-5"

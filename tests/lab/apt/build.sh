#!/bin/sh
# The makers' repositories, signed, with stand-in packages under the real names, into /out.
#
# Docker's packages hold Debian 13's own engine, so that a real one runs; only runc needs a newer C library
# than Debian 12 has, and comes from Debian 12 for it. The keys end with this container.
set -eu
src=/src
www=/out
architecture=$(dpkg --print-architecture)
work=$(mktemp -d)
chmod 755 "$work" # apt downloads as a user of its own
cd "$work"

# ── What is repacked ────────────────────────────────────────────────────────────────────────────
for list in /etc/apt/sources.list /etc/apt/sources.list.d/*; do
    [ -f "$list" ] || continue
    sed 's/trixie/bookworm/g' "$list" >"/etc/apt/sources.list.d/bookworm-${list##*/}"
done
printf 'Package: *\nPin: release n=bookworm*\nPin-Priority: 1\n' >/etc/apt/preferences.d/bookworm
apt-get update
apt-get install -y --no-install-recommends apt-utils gnupg
apt-get download docker.io docker-cli containerd runc tini docker-compose docker-buildx
for deb in *.deb; do
    dpkg-deb -x "$deb" trixie
done
mkdir older
(cd older && apt-get download runc/bookworm && dpkg-deb -x runc_*.deb "$work/bookworm")

# ── Packages ────────────────────────────────────────────────────────────────────────────────────
pack() { # tree, version, folder: build the tree's package into the folder
    sed -i "s/@VERSION@/$2/g; s/@ARCHITECTURE@/$architecture/" "$1/DEBIAN/control"
    mkdir -p "$3"
    dpkg-deb --root-owner-group -Zzstd -z1 -b "$1" "$3"
}

units() { # tree, units…: the package starts, stops and forgets these
    tree=$1
    shift
    for script in postinst prerm postrm; do
        sed "s/@UNITS@/$*/" "$src/docker/$script" >"$tree/DEBIAN/$script"
        chmod 755 "$tree/DEBIAN/$script"
    done
    mkdir -p "$tree/usr/lib/systemd/system"
    for unit; do
        sed 's|/usr/sbin/dockerd|/usr/bin/dockerd|' "trixie/usr/lib/systemd/system/$unit" \
            >"$tree/usr/lib/systemd/system/$unit"
    done
}

docker() { # package, upstream version: for both suites
    for suite in debian.12~bookworm debian.13~trixie; do
        tree=$work/tree/$1
        rm -rf "$tree"
        mkdir -p "$tree/DEBIAN" "$tree/usr/bin"
        cp "$src/docker/$1.control" "$tree/DEBIAN/control"
        case $1 in
            docker-ce)
                ln trixie/usr/sbin/dockerd trixie/usr/sbin/docker-proxy "$tree/usr/bin"
                ln trixie/usr/bin/tini-static "$tree/usr/bin/docker-init"
                units "$tree" docker.service docker.socket
                ;;
            docker-ce-cli) ln trixie/usr/bin/docker "$tree/usr/bin" ;;
            containerd.io)
                for name in containerd containerd-shim-runc-v2 ctr; do
                    ln "trixie/usr/bin/$name" "$tree/usr/bin"
                done
                ln "${suite##*~}/usr/sbin/runc" "$tree/usr/bin"
                mkdir -p "$tree/etc/containerd"
                echo 'disabled_plugins = ["cri"]' >"$tree/etc/containerd/config.toml"
                echo /etc/containerd/config.toml >"$tree/DEBIAN/conffiles"
                units "$tree" containerd.service
                ;;
            docker-*-plugin)
                mkdir -p "$tree/usr/libexec/docker/cli-plugins"
                ln "trixie/usr/libexec/docker/cli-plugins/${1%-plugin}" "$tree/usr/libexec/docker/cli-plugins"
                ;;
        esac
        pack "$tree" "$2-1~$suite" "$www/docker/linux/debian/dists/${suite##*~}/pool/stable/$architecture"
    done
}

stand_in() { # tree in the sources, version, folder
    tree=$work/tree/${1##*/}
    rm -rf "$tree"
    cp -r "$src/$1" "$tree"
    find "$tree" -type f -exec sed -i "s/@VERSION@/$2/g" {} +
    pack "$tree" "$2" "$3"
}

driver() { # version, folder
    tree=$work/driver
    rm -rf "$tree"
    cp -r "$src/cuda/nvidia-driver-cuda" "$tree"
    mkdir -p "$tree/usr/bin" "$tree/etc"
    cp /gpu/nvidia-smi "$tree/usr/bin"
    echo "${1%-*}" >"$tree/etc/stand-in-driver-version"
    pack "$tree" "$1" "$2"
    stand_in cuda/nvidia-kernel-open-dkms "$1" "$2"
}

mkdir tree
for version in 5:28.5.2 5:29.1.3; do
    docker docker-ce $version
    docker docker-ce-cli $version
done
docker containerd.io 2.2.0
docker docker-compose-plugin 2.40.3
docker docker-buildx-plugin 0.30.1
for version in 1.19.0-1 1.20.0-1; do
    for tree in "$src"/nvidia/*; do
        stand_in "nvidia/${tree##*/}" $version "$www/nvidia/libnvidia-container/stable/deb/$architecture"
    done
done
for debian in debian12 debian13; do
    driver 580.95.05-1 "$www/cuda/$debian/x86_64"
    driver 550.163.01-1 "$www/old/cuda/$debian/x86_64"
done

# ── Indexes ─────────────────────────────────────────────────────────────────────────────────────
index() { # folder of the debs below the current one, options of the Release file
    packages=$1
    shift
    mkdir -p "$packages"
    apt-ftparchive -o APT::FTPArchive::MD5=false -o APT::FTPArchive::SHA1=false \
        -o APT::FTPArchive::SHA512=false packages "$debs" >"$packages/Packages"
    gzip -kn "$packages/Packages"
    (cd "$release" && apt-ftparchive "$@" release . >"$work/Release" && mv "$work/Release" Release)
}

for suite in bookworm trixie; do
    cd "$www/docker/linux/debian"
    debs=dists/$suite/pool release=dists/$suite
    index "dists/$suite/stable/binary-$architecture" \
        -o APT::FTPArchive::Release::Origin=Docker -o "APT::FTPArchive::Release::Label=Docker CE" \
        -o APT::FTPArchive::Release::Suite=$suite -o APT::FTPArchive::Release::Components=stable \
        -o APT::FTPArchive::Release::Architectures="$architecture"
done
for folder in "$www/nvidia/libnvidia-container/stable/deb/$architecture" "$www"/cuda/*/x86_64 "$www"/old/cuda/*/x86_64; do
    cd "$folder"
    debs=. release=.
    index . -o "APT::FTPArchive::Release::Label=NVIDIA CORPORATION <cudatools@nvidia.com>" \
        -o APT::FTPArchive::Release::Architectures="$architecture"
done
cp -al "$www/docker/linux/debian" "$www/docker/linux/ubuntu"
for variant in rotated expired; do
    mkdir "$www/$variant"
    cp -al "$www/docker" "$www/nvidia" "$www/cuda" "$www/$variant"
done

# ── Keys and signatures ─────────────────────────────────────────────────────────────────────────
GNUPGHOME=$work/gnupg
export GNUPGHOME
mkdir -m 700 "$GNUPGHOME"

gpg_quietly() {
    gpg --batch --yes --quiet --pinentry-mode loopback --passphrase '' "$@"
}

for key in docker nvidia cuda rotated expired; do
    lasts=never
    clock=
    [ $key = expired ] && lasts=1d && clock=--faked-system-time=20240101T120000!
    gpg_quietly $clock --quick-generate-key "$key of the lab" ed25519 sign $lasts
    gpg_quietly --armor --export "=$key of the lab" >"$work/$key.asc"
    print=$(gpg --batch --with-colons --list-keys "=$key of the lab" | sed -n '/^fpr:/ { s/^fpr:*//; s/:$//p; q }')
    # Who has the expired key has missed that its maker signs on with it.
    [ $key = expired ] && gpg_quietly --quick-set-expire "$print" 0
    echo "\"$key\": \"$print\""
done | paste -sd, | sed 's/.*/{&}/' >"$www/fingerprints.json"

for variant in . old rotated expired; do
    for maker in docker nvidia cuda; do
        tree=$www/$variant/$maker
        [ -d "$tree" ] || continue
        case $variant in
            rotated | expired) key=$variant ;;
            *) key=$maker ;;
        esac
        find "$tree" -name Release | while read -r release; do
            gpg_quietly --local-user "=$key of the lab" --output "${release%/*}/InRelease" --clearsign "$release"
        done
        case $maker in
            docker) places="$tree/linux/debian/gpg $tree/linux/ubuntu/gpg" ;;
            nvidia) places=$tree/libnvidia-container/gpgkey ;;
            cuda) places="$tree/debian12/x86_64/3bf863cc.pub $tree/debian13/x86_64/8793F200.pub" ;;
        esac
        for place in $places; do
            install -m 644 "$work/$key.asc" "$place"
        done
    done
done
chmod -R a+rX "$www"

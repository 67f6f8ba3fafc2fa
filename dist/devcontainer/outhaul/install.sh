#!/bin/sh
# Installs Outhaul from an archive that scripts/package has made, and only from one with the given checksum:
#
#   ARCHIVE=https://…/outhaul-0.1.0-x86_64-unknown-linux-gnu.tar.gz SHA256=… install.sh
#
#   ARCHIVE  a URL, or a file
#   SHA256   its line of SHA256SUMS
#   PREFIX   where to: the program gets to PREFIX/bin (default /usr/local)
#
# A feature of development containers gets its options like that; the GitHub Action calls this as well.
set -eu
fail() {
  echo "install.sh: $*" >&2
  exit 1
}
: "${ARCHIVE:?must be the URL or the file of an archive of Outhaul}" "${SHA256:?must be the checksum of $ARCHIVE}"
bin=${PREFIX:-/usr/local}/bin
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
case $ARCHIVE in
  *://*)
    if command -v curl > /dev/null; then
      curl --fail --silent --show-error --location --retry 3 --output "$work/archive" "$ARCHIVE"
    else
      wget -q -O "$work/archive" "$ARCHIVE"
    fi || fail "failed to download ${ARCHIVE%%\?*}"
    ;;
  *) cp "$ARCHIVE" "$work/archive" ;;
esac
sum=$(sha256sum "$work/archive" | cut -d ' ' -f 1)
[ "$sum" = "$SHA256" ] || fail "${ARCHIVE%%\?*} has the checksum $sum, not $SHA256; nothing was installed"
tar -xzf "$work/archive" -C "$work"
# One for another kind of machine does not start.
version=$("$work"/outhaul-*/outhaul --version) || fail "the program in ${ARCHIVE%%\?*} does not run on this machine; nothing was installed"
mkdir -p "$bin"
# One that runs cannot be written to, but another can take its name.
mv -f "$work"/outhaul-*/outhaul "$bin/outhaul"
echo "installed $version in $bin"

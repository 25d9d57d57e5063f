# make demo | demo-pf | test | test-long | lab | bench | dumps | fuzz | fresh | deb: everything needed is installed first, see CONTRIBUTING.md.

PREFIX ?= /usr
DESTDIR ?=
# systemd and udev look here for a PREFIX of /usr or /usr/local; with another one, name folders that they read.
UNITS ?= $(PREFIX)/lib/systemd/system
# What the service adds to systemd's own unit that loads its kernel module.
MODULE := modprobe@xen_pciback.service.d
RULES ?= $(PREFIX)/lib/udev/rules.d
# Where the programs to install are.
BINARIES ?= target/release
CARGO ?= cargo
FUZZ_SECONDS ?= 600
BENCH_OPTIONS ?=
# A word in the names of the lab tests that are to run; empty: all.
ONLY ?=
# All of it is built in one profile and for the whole workspace: another choice of packages has other features of dependencies.
LAB = --locked --profile lab --workspace
STAGE = @tests/setup/stage.sh

.PHONY: all deps fresh binaries demo demo-pf test check unit emulator lab-test test-long lab bench dumps fuzz fuzz-short deb install uninstall stages-begin

all: binaries

deps:
	@tests/setup/host.sh

# That set-up works on a bare Debian 12 and a bare Debian 13, made with debootstrap; some minutes each.
fresh:
	@tests/setup/host.sh debootstrap debian-archive-keyring
	@CARGO="$(CARGO)" tests/setup/fresh.sh

binaries: deps
	$(CARGO) build --locked --release -p toolstack -p xpci-tests
	$(CARGO) build --locked --release -p pciback --examples

# A VF in a real guest on a real Xen, told step by step.
demo: binaries
	$(CARGO) run --locked --release -q -p xpci-tests --bin demo

# A guest has the card, and other guests have its VFs.
demo-pf: binaries
	$(CARGO) run --locked --release -q -p xpci-tests --bin demo -- pf

test: stages-begin check unit fuzz-short lab-test
	@tests/setup/stage.sh --summary

stages-begin:
	@tests/setup/stage.sh --begin

check: deps
	$(STAGE) "format" $(CARGO) fmt --all --check
	$(STAGE) "format of fuzz targets" $(CARGO) fmt --manifest-path tests/fuzz/Cargo.toml --check
	@# Its lock file is its own: 'cd tests/fuzz && cargo update -w' follows a change of the crates' dependencies.
	@$(CARGO) metadata --locked --format-version 1 --manifest-path tests/fuzz/Cargo.toml >/dev/null
	$(STAGE) "clippy" $(CARGO) clippy $(LAB) --all-targets -- -D warnings

unit: deps
	$(STAGE) "building tests and programs" $(CARGO) test $(LAB) --no-run
	@# The one with 4,096 VFs runs alone, else guests of the others take it for a slow host; it prints its times and memory.
	@# Most of them wait for their simulated guests and hosts: more run at once than there are processors.
	$(STAGE) "unit, property and simulation tests" env RUST_TEST_THREADS=8 $(CARGO) test $(LAB) -- --skip 4096_vfs
	$(STAGE) "4,096 VFs" $(CARGO) test $(LAB) --test transactions 4096_vfs -- --nocapture

fuzz-short: deps
	$(STAGE) "fuzz targets, 5 s each" env CARGO="$(CARGO)" tests/fuzz/run.sh 5

# 'make lab-test ONLY=word' runs the checks with this word in their names, and those that they need.
lab-test: emulator
	$(STAGE) "building programs for the lab" $(CARGO) build $(LAB) --bins --examples
	$(STAGE) "QEMU with corrections" target/lab/lab qemu
	$(STAGE) "machines that do not come up" $(CARGO) test $(LAB) --test failures -- --test-threads=1
	$(STAGE) "lab tests" $(CARGO) test $(LAB) --test lab -- $(ONLY)

# An hour or more; ONLY as above, and XPCI_ROUNDS=50 makes the test with kills shorter.
test-long: emulator
	$(STAGE) "building programs for the lab" $(CARGO) build $(LAB) --bins --examples
	$(STAGE) "long lab tests" $(CARGO) test $(LAB) --test long -- $(ONLY)

# What building a QEMU with corrections takes; that is done once and kept in the cache.
emulator:
	@tests/setup/host.sh ninja-build libglib2.0-dev libpixman-1-dev libslirp-dev python3-venv

# What make test does for seconds, for FUZZ_SECONDS each. A finding stays in tests/fuzz/regressions, to be replayed ever after.
fuzz: deps
	CARGO="$(CARGO)" tests/fuzz/run.sh $(FUZZ_SECONDS)

# A shell in the lab's dom0, where xpcid runs.
lab: binaries
	$(CARGO) run --locked --release -q -p xpci-tests --bin lab -- shell \
	    target/release/xpcid=/usr/sbin/xpcid target/release/xpci=/usr/sbin/xpci \
	    $(foreach policy,$(wildcard configs/policies/*.yaml),$(policy)=/usr/share/xpci/policies/$(notdir $(policy)))

# Each program runs, whatever becomes of the others; BENCH_OPTIONS are for the lab's, such as '--only pv --rounds 2'.
bench: emulator binaries
	@failed=; run() { name=$$1; shift; echo "== $$name"; "$$@" || failed="$$failed $$name"; }; \
	run filter $(CARGO) bench --locked -p toolstack --bench filter; \
	run inventory $(CARGO) bench --locked -p xpci-core --bench inventory; \
	run growth $(CARGO) bench --locked -p toolstack --bench growth; \
	run large-bar $(CARGO) bench --locked -p toolstack --bench large_bar; \
	run lab $(CARGO) run --locked --release -q -p xpci-tests --bin bench -- $(BENCH_OPTIONS); \
	[ -z "$$failed" ] || { echo "== failed:$$failed" >&2; exit 1; }

# Takes pciback/tests/dumps/qemu-*.txt anew from QEMU's devices.
dumps: deps
	$(CARGO) build --locked --release -p xpci-tests
	$(CARGO) run --locked --release -q -p xpci-tests --bin dumps

# A Debian package of what 'make binaries' built, in target/debian.
deb: binaries
	@packaging/deb.sh $(BINARIES) target/debian

# Installs what 'make binaries' built; builds nothing, because it may run as another user. Settings that are there stay.
install:
	@[ -e $(BINARIES)/xpcid ] && [ -e $(BINARIES)/xpci ] || { echo "install: no programs in $(BINARIES); run 'make binaries' first" >&2; exit 1; }
	install -D -m 755 $(BINARIES)/xpcid $(DESTDIR)$(PREFIX)/sbin/xpcid
	install -D -m 755 $(BINARIES)/xpci $(DESTDIR)$(PREFIX)/sbin/xpci
	install -d $(DESTDIR)$(UNITS) $(DESTDIR)/etc/xpci/policies
	sed 's|/usr/sbin/|$(PREFIX)/sbin/|' configs/systemd/xpcid.service > $(DESTDIR)$(UNITS)/xpcid.service
	chmod 644 $(DESTDIR)$(UNITS)/xpcid.service
	install -D -m 644 configs/systemd/$(MODULE)/xpcid.conf $(DESTDIR)$(UNITS)/$(MODULE)/xpcid.conf
	$(BINARIES)/xpci documents $(DESTDIR)$(PREFIX)/share >/dev/null
	install -D -m 644 udev-rules/90-xpci.rules $(DESTDIR)$(RULES)/90-xpci.rules
	install -D -m 644 -t $(DESTDIR)$(PREFIX)/share/xpci/policies configs/policies/*
	@[ -e $(DESTDIR)/etc/xpci/xpcid.yaml ] || { \
	    sed 's|/usr/share/xpci/|$(PREFIX)/share/xpci/|' configs/xpcid.yaml > $(DESTDIR)/etc/xpci/xpcid.yaml; \
	    chmod 644 $(DESTDIR)/etc/xpci/xpcid.yaml; echo "installed $(DESTDIR)/etc/xpci/xpcid.yaml"; }

# Leaves /etc/xpci and what the service recorded in /var/lib/xpci.
uninstall:
	rm -f $(DESTDIR)$(PREFIX)/sbin/xpcid $(DESTDIR)$(PREFIX)/sbin/xpci
	rm -f $(DESTDIR)$(UNITS)/xpcid.service $(DESTDIR)$(RULES)/90-xpci.rules
	rm -f $(DESTDIR)$(UNITS)/$(MODULE)/xpcid.conf
	rmdir --ignore-fail-on-non-empty $(DESTDIR)$(UNITS)/$(MODULE) 2>/dev/null || true
	cd $(DESTDIR)$(PREFIX)/share 2>/dev/null && rm -f man/man1/xpci.1 man/man1/xpci-*.1 man/man8/xpcid.8 \
	    man/man5/xpcid.yaml.5 man/man5/xpci-policy.5 \
	    bash-completion/completions/xpci bash-completion/completions/xpcid zsh/site-functions/_xpci zsh/site-functions/_xpcid \
	    fish/vendor_completions.d/xpci.fish fish/vendor_completions.d/xpcid.fish || true
	rm -rf $(DESTDIR)$(PREFIX)/share/xpci

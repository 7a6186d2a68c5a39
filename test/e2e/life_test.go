package e2e

import (
	"fmt"
	"strings"
	"testing"
)

// A volume's whole life, for each kind of volume: it is written, its pod is replaced, it is snapshotted and cloned
// while it is written, restored, expanded, and outlived by its snapshot.
func TestLife(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name   string
		claim  claim
		expand bool
	}{
		// ext4 grows in use only for a process with CAP_SYS_RESOURCE, which not every machine that runs this has.
		{"ext4", claim{class: "csi-qcow2"}, false},
		{"xfs", claim{class: "csi-qcow2-xfs"}, true},
		{"block", claim{class: "csi-qcow2-block", block: true}, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			life(newSpace(t), c.claim, c.expand)
		})
	}
}

func life(s *space, c claim, expand bool) {
	s.pvc("data", c)
	s.pod("first", nil, "data")
	s.ready("first")
	first := s.disk("first", "data", c)
	want := first.fill()
	s.deletePod("first")

	s.pod("second", nil, "data")
	s.ready("second")
	writer := s.disk("second", "data", c)
	if got := writer.sum(); got != want {
		s.Fatalf("after the pod moved the content's sum is %s, want %s", got, want)
	}
	writer.startAppending()
	before := writer.appended()
	s.snapshot("snap", "data")
	after := writer.appended()

	restored, cloned := c, c
	restored.source, cloned.source = fromSnapshot("snap"), fromClaim("data")
	s.pvc("restored", restored)
	s.pvc("cloned", cloned)
	s.pod("readers", nil, "restored", "cloned")
	s.ready("readers")
	s.disk("readers", "restored", c).verify(want, before, after)
	s.disk("readers", "cloned", c).verify(want, before, writer.appended())

	if expand {
		s.expand("data", "2Gi")
		if got := writer.size(); got < 1900<<20 {
			s.Errorf("expanded to 2Gi it has %d bytes", got)
		}
	}
	written := writer.appended()
	writer.stopAppending()
	writer.verify(want, written, writer.appended())

	s.deletePod("second")
	s.deletePVC("data")
	s.pvc("late", restored)
	s.pod("late", nil, "late")
	s.ready("late")
	s.disk("late", "late", c).verify(want, before, after)
}

// disk is a claim's volume in a pod. It holds 8 MiB of random bytes, and behind them records of 4 KiB, each written
// when the one before was acknowledged.
type disk struct {
	*space
	pod, file string
	block     bool
}

const recordOffset = 8 << 20 / 4096 // in records

func (s *space) disk(pod, volume string, c claim) disk {
	if c.block {
		return disk{s, pod, "/dev/" + volume, true}
	}
	return disk{s, pod, "/" + volume + "/file", false}
}

func (d disk) sh(script string) string {
	d.Helper()
	return d.exec(d.pod, d.variables()+script)
}

// read is sh of a script that changes nothing.
func (d disk) read(script string) string {
	d.Helper()
	return d.space.read(d.pod, d.variables()+script)
}

func (d disk) variables() string { return fmt.Sprintf("file=%s; offset=%d; ", d.file, recordOffset) }

// fill writes the random bytes and returns their sum.
func (d disk) fill() string {
	d.Helper()
	d.sh("dd if=/dev/urandom of=$file bs=1M count=8 conv=notrunc,fsync 2>/dev/null")
	return d.sum()
}

func (d disk) sum() string {
	d.Helper()
	sum, _, _ := strings.Cut(d.read("dd if=$file bs=1M count=8 2>/dev/null | sha256sum"), " ")
	return sum
}

// startAppending writes records until stopAppending, at most 33 a second: in eight minutes it reaches the last that records
// looks at. /tmp/last is the last that was acknowledged.
func (d disk) startAppending() {
	d.Helper()
	d.sh(`cat >/tmp/append <<S
i=0
while [ ! -e /tmp/stop ]; do
	printf '%-4095d\n' \$((i + 1)) | dd of=$file bs=4096 seek=\$(($offset + i)) conv=notrunc,fsync 2>/tmp/error || exit 1
	i=\$((i + 1))
	echo \$i >/tmp/next && mv /tmp/next /tmp/last
	sleep 0.03
done
touch /tmp/stopped
S
(sh /tmp/append || touch /tmp/failed) </dev/null >/dev/null 2>&1 &`)
	d.eventuallyExec(d.pod, "[ -e /tmp/last ]")
}

func (d disk) stopAppending() {
	d.Helper()
	d.sh("touch /tmp/stop")
	d.eventuallyExec(d.pod, "[ -e /tmp/stopped ]")
}

// appended returns how many records were acknowledged. It fails the test if a write has failed.
func (d disk) appended() (n int) {
	d.Helper()
	d.scan(d.read("if [ -e /tmp/failed ]; then cat /tmp/error; else cat /tmp/last; fi"), &n)
	return n
}

// records returns how many there are in one piece, and checks that behind them there is none.
func (d disk) records() (n int) {
	d.Helper()
	d.scan(d.read(`dd if=$file bs=4096 skip=$offset count=16384 2>/dev/null | tr -d '\0' |
awk '$1 != NR { print "record", $1, "in place of", NR; bad = 1; exit } END { if (!bad) print NR }'`), &n)
	return n
}

// verify checks the content: its sum, and that at least min and at most max+1 records are there: one may be under way.
func (d disk) verify(sum string, min, max int) {
	d.Helper()
	if got := d.sum(); got != sum {
		d.Errorf("%s in %s: the content's sum is %s, want %s", d.file, d.pod, got, sum)
	}
	if got := d.records(); got < min || got > max+1 {
		d.Errorf("%s in %s: there are %d records, want %d to %d", d.file, d.pod, got, min, max+1)
	}
}

// size returns what the device, or the file system, has in bytes.
func (d disk) size() (n int64) {
	d.Helper()
	if d.block {
		d.scan(d.read("blockdev --getsize64 $file"), &n)
		return n
	}
	d.scan(d.read("df -k $file | awk 'NR == 2 { print $2 }'"), &n)
	return n << 10
}

func (d disk) scan(text string, number any) {
	d.Helper()
	if _, err := fmt.Sscan(text, number); err != nil {
		d.Fatalf("in pod %s: %q is no number", d.pod, text)
	}
}

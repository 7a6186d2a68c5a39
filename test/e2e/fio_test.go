package e2e

import core "k8s.io/api/core/v1"

// busyPod makes the pod "writer", which has fio on the block volume "load", and on the file of the volume "data", after
// what sum is of, appends.
func (s *space) busyPod(where func(*core.Pod)) (load, data disk, sum string) {
	s.Helper()
	block := claim{class: "csi-qcow2-block", block: true}
	s.pvc("data", claim{})
	s.pvc("load", block)
	s.pod("writer", where, "data", "load")
	s.ready("writer")
	load, data = s.disk("writer", "load", block), s.disk("writer", "data", claim{})
	load.startLoad()
	sum = data.fill()
	data.startAppending()
	return load, data, sum
}

// startLoad has fio write to a block volume at random, with several requests at once, and read back what it wrote, again and
// again until stopLoad.
func (d disk) startLoad() {
	d.Helper()
	d.sh(`cat >/tmp/load <<S
: >/tmp/rounds
while [ ! -e /tmp/stop-load ]; do
	fio --name=load --filename=$file --size=128M --time_based --runtime=5 --rw=randwrite --bsrange=4k-64k \
		--ioengine=libaio --iodepth=8 --direct=1 --thinktime=20ms --thinktime_blocks=8 \
		--verify=crc32c --verify_backlog=64 --verify_fatal=1 >/tmp/fio 2>&1 || exit 1
	echo >>/tmp/rounds
done
S
(sh /tmp/load && echo ended >/tmp/load-ended || echo failed >/tmp/load-ended) </dev/null >/dev/null 2>&1 &`)
}

// stopLoad ends it after three rounds or more, and fails the test if a request has failed or other bytes were read than were
// written.
func (d disk) stopLoad() {
	d.Helper()
	d.eventuallyExec(d.pod, "[ -e /tmp/load-ended ] || [ $(wc -l </tmp/rounds) -ge 3 ]")
	d.sh("touch /tmp/stop-load")
	d.eventuallyExec(d.pod, "[ -e /tmp/load-ended ]")
	if end := d.read("cat /tmp/load-ended"); end != "ended" {
		d.Errorf("fio has %s: %s", end, d.read("cat /tmp/fio"))
	}
}

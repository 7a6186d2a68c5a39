package qcow2

import (
	"fmt"
	"sync/atomic"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
)

// RedoLog is what guests have changed in the mapping since the last commit, in memory that outlives the process. A
// process that dies loses nothing that it has written to the file, but an acknowledged write is found only by its
// mapping, which is in memory until the next flush. Whoever opens the image with the log of a dead process has it all.
//
// It is nothing against a crash of the machine, and is void then: a guest knows that only a flush is durable.
//
// In 64-bit words:
//
//	0 magic   1 begin   2 end   3 clusters per entry of the image, in bytes   8 records
//
// begin and end count records since the log was made. A record is 4 words: first guest cluster, clusters, descriptor and
// subclusters of the first. The descriptors of the others name the host clusters that follow, if the first names one.
type RedoLog struct {
	words []uint64
}

const (
	redoMagic   = 0x716377322d726431 // "qcw2-rd1"
	redoHeader  = 8
	redoWords   = 4 // of a record
	redoBegin   = 1
	redoEnd     = 2
	redoCluster = 3

	// maxRedoEntries bounds the entries that change at once, and so the records of one change.
	maxRedoEntries = 8192
	// MinRedoLog is the least length of a log, in words of 64 bits: twice as many records, 512 KiB.
	MinRedoLog = redoHeader + redoWords*maxRedoEntries*2
)

// NewRedoLog uses words, at least MinRedoLog of them, as a log: all zeros, or what an earlier process left in them. The
// memory is the caller's to keep and to free, after the image was closed.
func NewRedoLog(words []uint64) (*RedoLog, error) {
	l := &RedoLog{words: words}
	if len(words) < MinRedoLog {
		return nil, fmt.Errorf("redo log of %d words: the least is %d", len(words), MinRedoLog)
	}
	switch words[0] {
	case redoMagic:
		if l.end() < l.begin() || l.end()-l.begin() > l.capacity() {
			return nil, fmt.Errorf("%w: redo log from %d to %d of %d records", ErrCorrupt, l.begin(), l.end(), l.capacity())
		}
	case 0:
		words[0] = redoMagic
	default:
		return nil, fmt.Errorf("%w: redo log of another version: %#x", ErrUnsupported, words[0])
	}
	return l, nil
}

// used tells whether a process had an image open with the log.
func (l *RedoLog) used() bool { return l != nil && l.words[redoCluster] != 0 }

func (l *RedoLog) capacity() uint64 { return uint64(len(l.words)-redoHeader) / redoWords }
func (l *RedoLog) begin() uint64    { return atomic.LoadUint64(&l.words[redoBegin]) }

func (l *RedoLog) end() uint64 {
	if l == nil {
		return 0
	}
	return atomic.LoadUint64(&l.words[redoEnd])
}

// record returns the words of a record.
func (l *RedoLog) record(i uint64) []uint64 {
	return l.words[redoHeader+redoWords*(i%l.capacity()):][:redoWords]
}

// fits tells whether n entries can be noted.
func (l *RedoLog) fits(n int) bool {
	return l == nil || l.capacity()-(l.end()-l.begin()) >= uint64(n)
}

// note appends what entries from guest cluster first on are now. There must be room.
func (l *RedoLog) note(g format.Geometry, first int64, es []format.L2Entry) {
	if l == nil {
		return
	}
	end := l.end()
	for i := 0; i < len(es); end++ {
		n := 1
		for i+n < len(es) && es[i+n] == es[i].Next(g, n) {
			n++
		}
		r := l.record(end)
		r[0], r[1], r[2], r[3] = uint64(first)+uint64(i), uint64(n), es[i].Desc, uint64(es[i].Sub)
		i += n
	}
	// A process can die between any two stores; the records count from here on.
	atomic.StoreUint64(&l.words[redoEnd], end)
}

// forget drops the records before end, which are durable by other means.
func (l *RedoLog) forget(end uint64) {
	if l != nil {
		atomic.StoreUint64(&l.words[redoBegin], end)
	}
}

// changes returns for each L2 table, by its index in L1, what its entries became in the end.
func (l *RedoLog) changes(g format.Geometry) (map[int64]map[int64]format.L2Entry, error) {
	tables := map[int64]map[int64]format.L2Entry{}
	for i := l.begin(); i != l.end(); i++ {
		r := l.record(i)
		guest, n := int64(r[0]), int64(r[1])
		first := guest & (g.L2Entries - 1)
		if guest < 0 || n <= 0 || n > g.L2Entries-first {
			return nil, fmt.Errorf("%w: redo record of %d clusters from %d on", ErrCorrupt, n, guest)
		}
		index := guest / g.L2Entries
		t := tables[index]
		if t == nil {
			t = map[int64]format.L2Entry{}
			tables[index] = t
		}
		for k := range n {
			t[first+k] = format.L2Entry{Desc: r[2], Sub: format.SubBitmap(r[3])}.Next(g, int(k))
		}
	}
	return tables, nil
}

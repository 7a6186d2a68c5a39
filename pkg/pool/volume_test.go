package pool

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// A volume that cannot be read fails alone, and the error says which file it is.
func TestHostileVolumeFails(t *testing.T) {
	content := func(format string) func(t *testing.T, file, id string) {
		return func(t *testing.T, file, id string) {
			t.Helper()
			must(t, os.WriteFile(file, []byte(strings.ReplaceAll(format, "ID", id)), 0o600))
		}
	}
	remove := func(t *testing.T, file string) {
		t.Helper()
		must(t, os.RemoveAll(file))
	}
	for name, damage := range map[string]func(t *testing.T, file, id string){
		"empty":          content(""),
		"garbage":        content("\x00\xff{"),
		"an array":       content("[1,2,3]"),
		"no ID":          content(`{"name":"bad","size":1}`),
		"another's ID":   content(`{"id":"other-00000000-00000000","name":"bad","size":1}`),
		"a path":         content(`{"id":"../../../etc","name":"bad","size":1}`),
		"no name":        content(`{"id":"ID","size":1}`),
		"negative size":  content(`{"id":"ID","name":"bad","size":-1}`),
		"too large size": content(`{"id":"ID","name":"bad","size":9223372036854775808}`),
		"deep":           content(`{"id":"ID","parameters":` + strings.Repeat("[", 60000) + `}`),
		"huge": func(t *testing.T, file, id string) {
			t.Helper()
			must(t, os.Truncate(file, 1<<40))
		},
		"a link": func(t *testing.T, file, id string) {
			t.Helper()
			relink(t, file)
		},
		"a FIFO": func(t *testing.T, file, id string) {
			t.Helper()
			remove(t, file)
			must(t, unix.Mkfifo(file, 0o600))
		},
		"a directory": func(t *testing.T, file, id string) {
			t.Helper()
			remove(t, file)
			must(t, os.Mkdir(file, 0o700))
		},
		"nothing": func(t *testing.T, file, id string) {
			t.Helper()
			remove(t, file)
		},
		"nothing at all": func(t *testing.T, file, id string) {
			t.Helper()
			remove(t, filepath.Dir(file))
			must(t, os.Mkdir(filepath.Dir(file), 0o700))
		},
		"a linked volume": func(t *testing.T, file, id string) {
			t.Helper()
			relink(t, filepath.Dir(file))
		},
		"a file for a volume": func(t *testing.T, file, id string) {
			t.Helper()
			remove(t, filepath.Dir(file))
			must(t, os.WriteFile(filepath.Dir(file), nil, 0o600))
		},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPool(t)
			before, bad, after := create(t, p, "a"), create(t, p, "bad"), create(t, p, "c")
			damage(t, filepath.Join(filepath.Dir(p.ImagePath(bad)), volumeFile), bad)

			volumes, err := p.Volumes()
			wantNamed(t, "Volumes", err, bad)
			if len(volumes) != 2 || volumes[0].ID != before || volumes[1].ID != after {
				t.Errorf("volumes: %v", volumes)
			}
			for call, err := range map[string]error{
				"Volume":     errOf(p.Volume(bad)),
				"FindByName": errOf(p.FindByName("bad")),
				"Lock":       errOf(p.Lock(bad)),
				"Create":     p.Create(t.Context(), newVolume(p, "bad"), fillQCOW2), // it may be this one's
			} {
				wantNamed(t, call, err, bad)
			}
			want(t, "FindByName of another", errOf(p.FindByName("c")), nil)
			must(t, errOf(p.Space(nil)))
			create(t, p, "d")
			must(t, lock(t, p, after).Unlock())
		})
	}
}

// wantNamed wants an error that names the volume and is not "not found": a deleter would take that for done.
func wantNamed(t *testing.T, call string, err error, id string) {
	t.Helper()
	if err == nil || !strings.Contains(err.Error(), id) || len(err.Error()) > 1000 {
		t.Errorf("%s: %v; want an error that names %s", call, err, id)
	}
	for _, sentinel := range []error{ErrNotFound, ErrBadID, ErrNotReady, ErrInUse, ErrExists} {
		if errors.Is(err, sentinel) {
			t.Errorf("%s: %v is %v", call, err, sentinel)
		}
	}
}

func TestForeignNamesAmongVolumesArePassedOver(t *testing.T) {
	p := newPool(t)
	id := create(t, p, "v")
	put(t, filepath.Join(p.Dir(), volumesDir), "lost+found/", "notes.txt", ".hidden", "..volume/")
	if got := volumeIDs(t, p); !slices.Equal(got, []string{id}) {
		t.Errorf("volumes: %v", got)
	}
}

func TestUpdate(t *testing.T) {
	p := newPool(t)
	id := create(t, p, "v")
	l := lock(t, p, id)
	for i := range 5 { // both files of the pair, over each other, longer and shorter
		must(t, l.Update(func(v *Volume) {
			v.ID, v.Name = "else", "else"
			v.Parameters["round"] = strings.Repeat("r", 100*(5-i))
			v.Tombstone = i%2 == 0
		}))
		got, err := p.Volume(id)
		must(t, err)
		if got.ID != id || got.Name != "v" || len(got.Parameters["round"]) != 100*(5-i) || got.Tombstone != (i%2 == 0) {
			t.Fatalf("round %d: %+v", i, got)
		}
		if leased := l.Volume(); fmt.Sprint(leased) != fmt.Sprint(got) {
			t.Fatalf("round %d: the lease says %+v, the file %+v", i, leased, got)
		}
	}
	l.Volume().Parameters["round"] = "changed"
	if l.Volume().Parameters["round"] == "changed" {
		t.Error("the lease's volume was changed from outside")
	}
	if err := l.Update(func(v *Volume) { v.Source = strings.Repeat("s", volumeLimit) }); err == nil {
		t.Error("a volume.json that cannot be read back was written")
	}
	must(t, l.Unlock())
	must(t, lock(t, p, id).Unlock())
}

// Every state between the steps of an Update: the volume is the old one or the new one, and can be updated.
func TestUpdateCrashStates(t *testing.T) {
	spare := func(content string) func(t *testing.T, dir string) {
		return func(t *testing.T, dir string) {
			t.Helper()
			must(t, os.WriteFile(filepath.Join(dir, volumeFile+".spare"), []byte(content), 0o600))
		}
	}
	for name, crash := range map[string]func(t *testing.T, dir string){
		"spare begun":   spare(`{"id`),
		"spare emptied": spare(""),
		"spare longer":  spare(strings.Repeat("x", 5000)),
		"no spare": func(t *testing.T, dir string) {
			t.Helper()
			must(t, os.Remove(filepath.Join(dir, volumeFile+".spare")))
		},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPool(t)
			id := create(t, p, "v")
			crash(t, filepath.Dir(p.ImagePath(id)))
			v, err := p.Volume(id)
			if err != nil || v.Tombstone {
				t.Fatalf("volume: %+v, %v", v, err)
			}
			l := lock(t, p, id)
			must(t, l.Update(func(v *Volume) { v.Tombstone = true }), l.Unlock())
			if v, err := p.Volume(id); err != nil || !v.Tombstone {
				t.Fatalf("volume: %+v, %v", v, err)
			}
		})
	}
}

// Readers without a lock see the old volume or the new one while it is updated, also when they are so slow that
// the file they have opened is the spare, is overwritten, and is back in its place.
func TestReadersDuringUpdates(t *testing.T) {
	p := newPool(t)
	id := create(t, p, "v")
	l := lock(t, p, id)
	ctx, stop := context.WithCancel(t.Context())
	var readers sync.WaitGroup
	for range 3 {
		readers.Go(func() {
			for ctx.Err() == nil {
				if _, err := p.Volume(id); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for i := range 30 {
		must(t, l.Update(func(v *Volume) { v.Parameters["round"] = strings.Repeat("r", i*37%500) }))
	}
	stop()
	readers.Wait()
}

// What is open for reading is not overwritten.
func TestReplacingWaitsForReaders(t *testing.T) {
	p := newPool(t)
	id := create(t, p, "v")
	d, err := p.openVolume(id)
	must(t, err)
	defer d.Close()
	reader, err := d.Open(volumeFile + ".spare") // it was volume.json when the reader opened it
	must(t, err, flock(reader, unix.LOCK_SH))
	before, err := os.ReadFile(reader.Name())
	must(t, err)

	l := lock(t, p, id)
	updated := make(chan error, 1)
	go func() { updated <- l.Update(func(v *Volume) { v.Tombstone = true }) }()
	for !flockIsAwaited(t, reader) {
		select {
		case err := <-updated:
			t.Fatalf("Update did not wait: %v", err)
		default:
			runtime.Gosched()
		}
	}
	after, err := io.ReadAll(reader)
	must(t, err)
	if !bytes.Equal(before, after) {
		t.Error("a file was overwritten while it was read")
	}
	must(t, reader.Close(), <-updated)
	if v, err := p.Volume(id); err != nil || !v.Tombstone {
		t.Errorf("volume: %+v, %v", v, err)
	}
}

// flockIsAwaited tells whether somebody waits for the lock on a file, as /proc/locks has it.
func flockIsAwaited(t *testing.T, f *os.File) bool {
	t.Helper()
	st, err := f.Stat()
	must(t, err)
	sys, ok := st.Sys().(*syscall.Stat_t)
	if !ok {
		t.Fatal("no inode number")
	}
	locks, err := os.ReadFile("/proc/locks")
	must(t, err)
	for line := range strings.Lines(string(locks)) {
		if strings.Contains(line, "-> FLOCK") && strings.Contains(line, fmt.Sprintf(":%d ", sys.Ino)) {
			return true
		}
	}
	return false
}

// Updates of a volume from several places are made one after the other: none is lost.
func TestUpdatesAtOnce(t *testing.T) {
	p := newPool(t)
	id := create(t, p, "v")
	l := lock(t, p, id)
	before := l.Volume().Size
	const writers, times = 4, 20
	var all sync.WaitGroup
	for range writers {
		all.Go(func() {
			for range times {
				if err := l.Update(func(v *Volume) { v.Size++ }); err != nil {
					t.Error(err)
				}
				if l.Volume().Size <= before {
					t.Error("an Update is not seen")
				}
			}
		})
	}
	all.Wait()
	v, err := p.Volume(id)
	must(t, err)
	if got := v.Size - before; got != writers*times {
		t.Errorf("%d of %d updates", got, writers*times)
	}
}

package pool

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
)

// TestChild is what other processes of the tests do; by itself it does nothing.
func TestChild(t *testing.T) {
	roles := map[string]func(*testing.T, *Pool, string){
		"create": childCreates,
		"lock":   childLocks,
		"race":   childRaces,
	}
	role, ok := roles[os.Getenv(childRole)]
	if !ok {
		return
	}
	p, err := Open(os.Getenv(childPool))
	must(t, err)
	role(t, p, os.Getenv(childArg))
}

func say(line string) { fmt.Println(line) }

func awaitEndOfInput(t *testing.T) {
	t.Helper()
	must(t, errOf(io.Copy(io.Discard, os.Stdin)))
}

// childCreates stops in the middle of a Create.
func childCreates(t *testing.T, p *Pool, name string) {
	t.Helper()
	must(t, p.Create(t.Context(), newVolume(p, name), func(ctx context.Context, path string) error {
		if err := fillQCOW2(ctx, path); err != nil {
			return err
		}
		say("filled")
		awaitEndOfInput(t)
		return nil
	}))
}

// childLocks holds a volume.
func childLocks(t *testing.T, p *Pool, id string) {
	t.Helper()
	l := lock(t, p, id)
	say("locked")
	awaitEndOfInput(t)
	must(t, l.Unlock())
}

// childRaces takes the volume over and over, and sees each time that nobody else has it.
func childRaces(t *testing.T, p *Pool, id string) {
	t.Helper()
	say("ready")
	awaitEndOfInput(t)
	proof := filepath.Join(p.Dir(), "proof")
	for won := 0; won < 50; {
		l, err := p.Lock(id)
		if errors.Is(err, ErrInUse) {
			continue
		}
		must(t, err)
		f, err := os.OpenFile(proof, os.O_CREATE|os.O_EXCL, 0o600)
		if errors.Is(err, fs.ErrExist) {
			t.Fatal("two have the volume")
		}
		must(t, err, f.Close(), os.Remove(proof), l.Unlock())
		won++
	}
}

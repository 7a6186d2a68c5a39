package demo

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
)

// tree is the content of a directory: what each path in it is.
type tree struct {
	paths  []string          // sorted, so a directory comes before what is in it
	sums   map[string]string // type, permissions and SHA-256 (or the link's target) by path
	files  int
	length int64 // bytes of all files
}

func (t tree) String() string {
	return fmt.Sprintf("%d files, %d MiB", t.files, t.length>>20)
}

// readTree walks root and hashes each file. What mkfs makes, lost+found, is no content.
func readTree(ctx context.Context, root string) (tree, error) {
	t := tree{sums: make(map[string]string)}
	err := filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		if err = errors.Join(err, ctx.Err()); err != nil {
			return err
		}
		rel, err := filepath.Rel(root, path)
		switch {
		case err != nil:
			return err
		case rel == ".":
			return nil
		case rel == "lost+found":
			return fs.SkipDir
		}
		sum, n, err := describe(path, entry)
		if err != nil {
			return err
		}
		if entry.Type().IsRegular() {
			t.files, t.length = t.files+1, t.length+n
		}
		t.paths, t.sums[rel] = append(t.paths, rel), sum
		return nil
	})
	slices.Sort(t.paths)
	return t, err
}

func describe(path string, entry fs.DirEntry) (sum string, length int64, err error) {
	info, err := entry.Info()
	if err != nil {
		return "", 0, err
	}
	switch {
	case info.IsDir():
	case info.Mode()&fs.ModeSymlink != 0:
		sum, err = os.Readlink(path)
	case info.Mode().IsRegular():
		sum, length, err = hashFile(path)
	}
	return info.Mode().String() + " " + sum, length, err
}

// hashFile returns the SHA-256 of a file or a block device, and its length.
func hashFile(path string) (sum string, length int64, err error) {
	f, err := os.Open(path)
	if err != nil {
		return "", 0, err
	}
	defer f.Close()
	h := sha256.New()
	length, err = io.Copy(h, f)
	return fmt.Sprintf("%x", h.Sum(nil)), length, err
}

// differences returns in how many paths two trees differ, and an example.
func differences(want, got tree) (count int, example string) {
	both := maps.Clone(want.sums)
	maps.Copy(both, got.sums)
	for path := range both {
		if want.sums[path] != got.sums[path] {
			count++
			example = fmt.Sprintf("%s: want %q, have %q", path, want.sums[path], got.sums[path])
		}
	}
	return count, example
}

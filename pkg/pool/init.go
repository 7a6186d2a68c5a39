package pool

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
)

// unfinishedFile is in a directory that Init is making a pool of, and becomes pool.json.
const unfinishedFile = identityFile + ".unfinished"

// Init makes path a pool: a directory that does not exist yet, or is empty but for lost+found. A pool is left as it is.
// Anything else is refused: a directory with volumes and no pool.json is a damaged pool, not a new one.
func Init(path string) error { return InitOn(path, "") }

// InitOn is Init for a node, whose a new pool is from the start.
func InitOn(path, node string) error {
	if err := os.MkdirAll(path, 0o700); err != nil {
		return err
	}
	root, err := openDir(path)
	if err != nil {
		return err
	}
	defer root.Close()
	lock, err := lockDir(root, exclusive) // against another Init
	if err != nil {
		return err
	}
	defer lock.Close()

	_, err = root.Lstat(identityFile)
	switch {
	case err == nil:
		err = checkPool(path)
	case errors.Is(err, fs.ErrNotExist):
		err = initialise(root, node)
	}
	if err != nil {
		return err
	}
	return root.syncAll() // the directory's own name too, and those of directories above it that were made
}

// checkPool tells whether what has a pool.json is a pool.
func checkPool(path string) error {
	root, _, err := enter(path)
	if err != nil {
		return err
	}
	return root.Close()
}

// refuseForeign returns an error if the directory holds more than what an interrupted Init leaves.
func refuseForeign(root dir) error {
	names, err := root.names()
	if err != nil {
		return err
	}
	ours := []string{"lost+found"}
	if slices.Contains(names, unfinishedFile) {
		ours = append(ours, unfinishedFile, volumesDir, creatingDir, removingDir)
	}
	for _, name := range names {
		if !slices.Contains(ours, name) {
			return fmt.Errorf("%s is not empty (%s) and holds no %s: refusing to make it a pool", root.Name(), name, identityFile)
		}
	}
	return nil
}

// initialise creates everything before pool.json: with it, the pool is whole.
func initialise(root dir, node string) error {
	if err := refuseForeign(root); err != nil {
		return err
	}
	f, err := root.openReserved(unfinishedFile)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := root.sync(); err != nil { // what follows is an interrupted Init's only beside it
		return err
	}
	for _, sub := range []string{volumesDir, creatingDir, removingDir} {
		if err := root.Mkdir(sub, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	data, err := json.Marshal(identity{Version: identityVersion, UUID: newUUID(), Node: node, Birth: root.birth()})
	if err != nil {
		return err
	}
	if err := overwrite(f, append(data, '\n')); err != nil {
		return err
	}
	if err := root.sync(); err != nil {
		return err
	}
	return root.Rename(unfinishedFile, identityFile)
}
